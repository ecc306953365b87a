"""What ingest's processes import starts without torch."""

import subprocess
import sys


def test_privacy_reports_and_samples_do_without_torch():
    code = ("import sys; import megamed.data.privacy.profile, megamed.data.privacy.audit, megamed.data.reports, "
            "megamed.data.samples.validate; sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

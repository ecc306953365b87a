"""What the rank processes have imported before they are forked."""

import megamed.train  # noqa: F401

"""De-identification: pseudonyms under a project key, and what of a header may be kept."""

from megamed.data.privacy.keys import load_or_create_key, private_folder
from megamed.data.privacy.pseudonyms import Pseudonyms

__all__ = ["Pseudonyms", "load_or_create_key", "private_folder"]

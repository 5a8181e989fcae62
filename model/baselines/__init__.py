"""Other people's models of attribute values, one file each, on the same questions as SMARTAVE."""

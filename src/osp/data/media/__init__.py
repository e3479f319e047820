"""Files <-> pixels."""

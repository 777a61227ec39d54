"""Projects that use kdlib and are no part of it: kdlib knows none of them, and an installation of kdlib brings none."""

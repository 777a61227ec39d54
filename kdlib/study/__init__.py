"""The study: everything that stands on the library and is no part of it."""

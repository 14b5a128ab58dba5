"""IVFPQ indexes: built, kept, exported."""

"""IVFPQ indexes: quantisers, building, searching, export."""

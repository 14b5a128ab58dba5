"""The paper's way: the adaptive threshold on distances of an IVFPQ index."""

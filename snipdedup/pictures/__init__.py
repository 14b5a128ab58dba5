"""Pictures: files, tars and tables of them, decoded, embedded by a model, moved when they go."""

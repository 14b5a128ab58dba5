"""What was found, proved; what was lost, measured."""

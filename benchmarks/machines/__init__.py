"""The pipeline on several Ray nodes of one computer."""

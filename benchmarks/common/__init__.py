"""What several benchmark commands use."""

"""What large base models need, as a page."""

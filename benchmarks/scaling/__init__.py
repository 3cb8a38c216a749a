"""What a run takes on several machines beside what its plan says."""

"""Methods of steering side by side: answers, statistics and a report."""

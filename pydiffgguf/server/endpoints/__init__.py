"""What each path does: a request becomes a job, its result a reply."""

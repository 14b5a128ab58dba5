"""Who does the tasks of a run: threads, processes, machines that share a folder, Ray."""

"""What a job does: each task is one file with a function `run(config, context)`, named by conf/task/<name>.yaml."""

from toy_runs import teacher  # noqa: F401

from toy_runs import recipe, start, teacher  # noqa: F401

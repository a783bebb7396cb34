from toy_runs import recipe, start, teacher, whole  # noqa: F401

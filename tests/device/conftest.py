from toy_runs import live, recipe, start, teacher, whole  # noqa: F401

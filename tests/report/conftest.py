from report_runs import bare, full  # noqa: F401

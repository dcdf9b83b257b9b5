"""report.html: a run, or a pipeline's phases, as one page for people, made from the files of its folder alone."""

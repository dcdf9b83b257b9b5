"""R1's phases in small: a second embedded model, its task, and the pipeline that trains one on the other."""

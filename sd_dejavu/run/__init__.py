"""One run of any host: a controller that knows what to do, one judge, and the report on what was found."""

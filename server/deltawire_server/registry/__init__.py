"""Which models can be called, under which names. The only folder that knows a database; it knows neither gRPC nor HTTP.

`model` is what all pass around, `schema` the tables and how they came to be, `store` the database, `registry` the
rules.
"""

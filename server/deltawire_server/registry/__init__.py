"""Which models can be called, under which names. The only folder that knows a database; it knows neither gRPC nor HTTP.

    registry ─┬─ rules      a registration: what may be asked for, and whether it is served
              ├─ catalog    the Llama models by all their names, and what of a listing a name means
              ├─ lookup     a name to its model: registered, else discovered
              ├─ pages      sizes and tokens of a list
              ├─ writes     database first, then memory, each write as a whole
              ├─ known      the registered models in memory, by id, alias and target
              ├─ listings   what the providers serve, as models
              └─ store      the database ── schema   its tables and how they came to be

`registry` is what others call. All pass `model`s around; `messages` shows names in failures.
"""

"""Which models can be called, under which names. The only folder that knows a database; it knows neither gRPC nor HTTP.

    registry ─┬─ rules      a registration: what may be asked for, and whether it is served
              ├─ catalog    the Llama models by all their names, and what of a listing a name means
              ├─ lookup     a name to its model: registered, else discovered
              ├─ listings   what the providers serve, as one call sees it
              ├─ pages      sizes and tokens of a list
              │
              ├─ writes     database first, then memory, each write as a whole
              ├─ follower   memory in step with the database, whoever writes ──▶ known, what is registered
              ├─ refresh    every provider listed again and again            ──▶ served, what was listed last
              ├─ view       both together, and what changes in them
              ├─ feed       the changes, for those who watch
              │
              └─ store      what is kept, in one order of changes
                 ├─ database   what differs between SQLite and, in postgres, PostgreSQL
                 ├─ schema     the tables and how they came to be
                 └─ records    models as rows

`registry` is what others call. All pass `model`s around; `messages` shows names in failures.
"""

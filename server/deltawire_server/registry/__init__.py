"""The registry: which models can be called, under which names. Only this folder uses a database; it uses neither gRPC nor HTTP.

    registry ─┬─ rules               validates registrations
              ├─ catalog             the names of the Llama models, and which entry of a listing a name refers to
              ├─ lookup              resolves a name to a model: a registered one first, then a discovered one
              ├─ scopes              names that are reserved for a provider
              ├─ pages               page sizes and page tokens
              ├─ writes              writes the database first, then memory
              ├─ change_log_reader   applies the database's changes to memory
              ├─ refresh             lists every provider periodically
              └─ store               the registered models and the log of changes
                 ├─ database         the interface of the databases, implemented in sqlite and postgres
                 ├─ tables           the tables and their migrations
                 └─ rows             converts models to rows

Three modules keep models in memory, each for one purpose:

    database ──▶ registered_index ──┐  by name and target; without state
                                    ├─ view ──▶ feed   all models with their states, and their changes
    providers ──▶ listing_cache ────┘  by provider and served name; also of models that are registered
                     └──▶ listings     what one call sees: references to these, or the listing of the caller's own token

Lookups read `registered_index`, then `listings`; lists and watches read `feed`.

`registry` is the API for other packages. `model` defines the models; `messages` formats names for error messages.
"""

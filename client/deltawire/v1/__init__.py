"""The API's messages and stubs, generated from `protos/deltawire/v1` by `make protos`; nothing else here is written by hand."""

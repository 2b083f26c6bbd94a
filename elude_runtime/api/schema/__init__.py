"""The wire documents (interface "HTTP"): what a request may say and what a reply says. Strict: no coercion, no NaN, no
unknown or duplicate keys. This package knows no torch, so that clients can use it.

`request` and `reply` are the documents of a prediction, `operations` those beside it, `kserve` the two protocols of
KServe, `json_text` strict parsing. Names that two modules have (a target that is asked for, one that was explained)
are kept apart by their module.
"""

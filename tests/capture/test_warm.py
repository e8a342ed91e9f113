"""The made-up stream that compiles the decoder."""

from deltaworks.capture.postgres.warm import compile_loops


def test_every_kind_of_column_goes_through_the_compiled_loops() -> None:
    (batch,) = compile_loops().batches
    assert batch.rows.column("_op").to_pylist() == ["c", "u", "u", "d"]
    made = batch.rows.to_pylist()[0]
    assert made["_as_text"] is None
    assert all(made[name] is not None for name in batch.schema.names)


def test_both_forms_of_the_values_say_the_same() -> None:
    text, binary = (compile_loops(in_binary=in_binary).batches[0] for in_binary in (False, True))
    assert text.rows.to_pylist() == binary.rows.to_pylist()

"""Which columns a document is made of, found by trying."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltaworks.position import Lsn, Version
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.process.lineage import observe, read, save


@dataclass(frozen=True)
class Film:
    title: str
    year: int | None
    status: str


@dataclass(frozen=True)
class Credit:
    person_id: int
    role: str


shop = Source("shop")
credit = shop.table("credit", schema=Credit)
app = App("films", key="film_id", sources=[shop.table("film", schema=Film), credit])


@app.enrich(into="people", key=lambda film: [], lookup=shop.table("person", key="person_id"))
async def people(ids: list[int]) -> dict[int, dict[str, Any]]:
    return {}


@app.transform
def document(film: Entity[Film]) -> Mapping[str, Any]:
    directors = [film["people"][row.person_id]["name"] for row in film.rows(credit) if row.role == "director"]
    return {"label": f"{film.after.title} ({film.after.year})", "directors": directors, "kind": "film"}


SAMPLE = Entity(
    key=1,
    after=Film("Laura", 1944, "released"),
    version=Version(Lsn(1), 0),
    committed_at=datetime(2026, 1, 1, tzinfo=UTC),
    related={"credit": [Credit(7, "director"), Credit(8, "cast")]},
    enriched={"people": {7: {"name": "Otto Preminger"}, 8: {"name": "Gene Tierney"}}},
)


def test_a_field_leads_to_the_columns_that_change_it_and_to_no_other() -> None:
    assert observe(app, [SAMPLE], clients={}) == {
        "label": {("film", "title"), ("film", "year")},
        # A role decides whether a name stands in the list, so it is an input of the list.
        "directors": {("credit", "role"), ("person", "name")},
        "kind": frozenset(),
    }


def test_what_earlier_samples_showed_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "lineage.json"
    assert read(file) == {}
    save({"label": frozenset({("film", "title")})}, file)
    save({"label": frozenset({("film", "year")}), "new": frozenset()}, file)
    assert read(file) == {"label": {("film", "title"), ("film", "year")}, "new": frozenset()}

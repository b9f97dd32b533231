"""A few films and a random recommender over them: what it says is made up."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from models.checkpoint import Recommender, read_recommender
from tests.tiny import make_tiny_recommender, write_tiny_data

FILMS = (
    "Star Wars (1977)",
    "Fargo (1996)",
    "Return of the Jedi (1983)",
    "Toy Story (1995)",
    "Alien (1979)",
    "Aliens (1986)",
    "Scream (1996)",
    "Twelve Monkeys (1995)",
    "Fugitive, The (1993)",
    "Back to the Future (1985)",
    "Star Trek: First Contact (1996)",
    "Star Trek: Generations (1994)",
    "Star Trek: The Motion Picture (1979)",
    "Star Trek V: The Final Frontier (1989)",
    "Star Maps (1997)",
    "Stargate (1994)",
    "Starship Troopers (1997)",
    "Lone Star (1996)",
    "Mars Attacks! (1996)",
    "Casablanca (1942)",
    "Vertigo (1958)",
    "Rear Window (1954)",
    "Psycho (1960)",
    "Gandhi (1982)",
    "Braveheart (1995)",
    "Speed (1994)",
    "Babe (1995)",
    "Brazil (1985)",
    "Amadeus (1984)",
    "Annie Hall (1977)",
    "Chinatown (1974)",
    "Jaws (1975)",
    "Top Gun (1986)",
    "Platoon (1986)",
)


def make_film_recommender(folder: Path, *others: str) -> Recommender:
    """Write the recommender of these films and others under a folder and return it."""
    titles = [*FILMS, *others]
    data = write_tiny_data(folder / "films", items=80)
    titles += [f"Film {number} ({1950 + number})" for number in range(80 - len(titles))]
    items = pa.table({"item_id": [f"i{number}" for number in range(80)], "title": titles})
    pq.write_table(items, data / "items.parquet")
    make_tiny_recommender(folder / "made-up", data=data, num_layers=2)
    return read_recommender(folder / "made-up")

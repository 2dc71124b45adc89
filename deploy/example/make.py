"""Write the example shop: `python deploy/example/make.py`.

Made up. Customers walk along shelves, so there is an order to learn.
"""

import csv
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

HERE = Path(__file__).parent
START = datetime(2026, 1, 1, tzinfo=UTC)
SHELVES = {
    "coffee": ["Grinder", "Beans", "Filter papers", "Kettle", "Scale", "Dripper", "Mug", "Cleaning brush"],
    "bread": ["Flour", "Sourdough starter", "Proofing basket", "Bread knife", "Dutch oven", "Dough scraper", "Toaster"],
    "garden": ["Seeds", "Pots", "Soil", "Trowel", "Watering can", "Gloves", "Pruner", "Fertiliser", "Plant labels"],
    "bike": ["Helmet", "Lights", "Lock", "Pump", "Bottle", "Bottle cage", "Panniers", "Repair kit", "Bell"],
    "paint": ["Brushes", "Acrylics", "Canvas", "Easel", "Palette", "Varnish", "Apron"],
}
BRANDS = ["Alba", "Birk", "Corvo"]


def items() -> list[dict[str, str]]:
    """Every product in every brand's version; some are listed late, some delisted."""
    rows = []
    for shelf, names in SHELVES.items():
        for place, name in enumerate(names):
            for brand in BRANDS:
                number = len(rows)
                listed = START + timedelta(days=60 if number % 11 == 0 else 0)
                delisted = (START + timedelta(days=150)).isoformat() if number % 17 == 5 else ""
                rows.append(
                    {
                        "sku": f"{shelf[:2].upper()}{place:02d}-{brand[0]}", "name": f"{brand} {name.lower()}",
                        "shelf": shelf, "brand": brand, "listed_at": listed.isoformat(), "delisted_at": delisted,
                    }
                )  # fmt: skip
    return rows


def events(products: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Customers who view the next product on a shelf, mostly of one brand, and buy some."""
    rows = []
    for customer in range(1, 401):
        at = START + timedelta(minutes=rng.randrange(150 * 24 * 60))
        brand = rng.choice(BRANDS)
        for shelf in rng.sample(list(SHELVES), rng.choice([1, 2, 2, 3])):
            shown = [p for p in products if p["shelf"] == shelf and p["brand"] == brand]
            first = rng.randrange(3)
            for product in shown[first : first + rng.randint(3, 7)]:
                at += timedelta(minutes=rng.randint(1, 600))
                if not product["listed_at"] <= at.isoformat() < (product["delisted_at"] or "9"):
                    continue
                actions = ["view"] + (["cart", "purchase"] if rng.random() < 0.3 else [])
                rows += [
                    {
                        "customer": f"c{customer}", "sku": product["sku"], "action": action,
                        "price": f"{rng.randint(5, 90)}.90" if action == "purchase" else "", "at": at.isoformat(),
                    }
                    for action in actions
                ]  # fmt: skip
    return sorted(rows, key=lambda r: r["at"])


def write(name: str, rows: list[dict[str, str]]) -> None:
    """A CSV file beside this one."""
    with (HERE / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    made = items()
    write("items.csv", made)
    write("events.csv", events(made, random.Random(7)))

"""The event log, the live catalogue, and the outbox of the history cache.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_sequence = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("seq", _sequence, autoincrement=True, nullable=False, comment="arrival: the log's own order"),
        sa.Column("event_id", sa.String(256), nullable=False),
        sa.Column("user_id", sa.String(256), nullable=False),
        sa.Column("item_id", sa.String(256), nullable=False),
        sa.Column("event_type", sa.String(64), nullable=False),
        sa.Column("value", sa.Float(53)),
        sa.Column("timestamp", sa.BigInteger, nullable=False, comment="epoch microseconds"),
        sa.Column("recommendation_id", sa.String(256)),
        sa.Column("session_id", sa.String(256)),
        sa.Column(
            "digest",
            sa.String(32),
            nullable=False,
            comment="hash of the fields as sent: tells a retry from a conflict",
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_events"),
        sa.UniqueConstraint("user_id", "event_id", name="uq_events_user_id_event_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_user_id_timestamp_seq", "events", ["user_id", "timestamp", "seq"])
    op.create_table(
        "items",
        sa.Column("item_id", sa.String(256), nullable=False),
        sa.Column("title", sa.Text),
        sa.Column("categories", sa.JSON, comment='list of "field:value"; null leaves what the bundle says'),
        sa.Column("available_from", sa.BigInteger, comment="epoch microseconds; null leaves what the bundle says"),
        sa.Column("available_until", sa.BigInteger),
        sa.Column("withdrawn", sa.Boolean, nullable=False),
        sa.Column(
            "revision",
            sa.BigInteger,
            nullable=False,
            comment="of the whole catalogue, at this item's last change",
        ),
        sa.Column(
            "loaded",
            sa.Boolean,
            nullable=False,
            server_default=sa.false(),
            comment="from a file, not by a call: gives way to the bundle",
        ),
        sa.PrimaryKeyConstraint("item_id", name="pk_items"),
    )
    op.create_index("ix_items_revision", "items", ["revision"])
    revisions = op.create_table(
        "catalogue_revision",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column(
            "revision", sa.BigInteger, nullable=False, comment="one row; changing it orders all catalogue changes"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_catalogue_revision"),
    )
    op.bulk_insert(revisions, [{"id": 1, "revision": 0}])
    op.create_table(
        "cache_outbox",
        sa.Column("seq", _sequence, autoincrement=False, nullable=False),
        sa.Column("user_id", sa.String(256), nullable=False),
        sa.Column("written", sa.BigInteger, nullable=False, comment="epoch microseconds"),
        sa.PrimaryKeyConstraint("seq", name="pk_cache_outbox"),
        comment="events that may not have reached the history cache yet; a row goes when its event has",
    )


def downgrade() -> None:
    for table in ("cache_outbox", "catalogue_revision", "items", "events"):
        op.drop_table(table)

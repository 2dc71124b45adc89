"""Erasure: tombstones of users, traces of their newest events, and the key of both.

Revision ID: 0002
Revises: 0001
"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "erasures",
        sa.Column("user_hash", sa.String(64), nullable=False, comment="HMAC-SHA256 of the user id, in hex"),
        sa.Column(
            "erased_at",
            sa.BigInteger,
            nullable=False,
            comment="epoch microseconds; the user's events up to it are gone",
        ),
        sa.PrimaryKeyConstraint("user_hash", name="pk_erasures"),
    )
    op.create_table(
        "erased_events",
        sa.Column("event_hash", sa.String(64), nullable=False, comment="HMAC-SHA256 of user id and event id, in hex"),
        sa.Column("erased_at", sa.BigInteger, nullable=False, comment="epoch microseconds"),
        sa.PrimaryKeyConstraint("event_hash", name="pk_erased_events"),
        comment="events that were a day old at most when their user was erased: a retry without a time is known by it",
    )
    keys = op.create_table(
        "erasure_key",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("key", sa.String(64), nullable=False, comment="one row; 256 bits in hex"),
        sa.PrimaryKeyConstraint("id", name="pk_erasure_key"),
    )
    op.bulk_insert(keys, [{"id": 1, "key": secrets.token_hex(32)}])


def downgrade() -> None:
    for table in ("erasure_key", "erased_events", "erasures"):
        op.drop_table(table)

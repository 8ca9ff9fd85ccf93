"""The standing campaign: whatever clients send, disks refuse, files hold and signals end, nothing is lost or hangs.

    uv run python -m tests.campaign                 # all of it, about half an hour
    uv run python -m tests.campaign kills --kills 500 --seed 7

Each part counts what was tried, what went through, what was refused as it should be, and what failed. What it draws
depends on the seed alone; when a signal strikes does not. `test_campaign.py` is a short run of every part.
"""

"""`genvalues plan`: the plan that `genvalues write` writes, with today's price and what the Hub has counted."""

from __future__ import annotations

import re

from genvalues.errors import UserError
from genvalues.inputs import Inputs
from genvalues.plan.planning import Plan, Priced, known_price
from genvalues.plan.prices import live_price, region_of
from genvalues.sources import Sources
from genvalues.write import checked


def planned(sources: Sources, *, live: bool, offline: bool, region: str | None) -> Plan:
    """Raises every mistake in the inputs, and UserError for options that contradict one another."""
    if live and offline:
        raise UserError("asks AWS, which --offline forbids", where="--live", fix="Leave one of the two out.")
    if region is not None and not re.match(r"^[a-z]{2}(-[a-z]+)+-[0-9]\Z", region):
        raise UserError(f"{region[:40]!r} is no AWS region", where="--region", fix="Write one such as us-west-2.")

    def price(inputs: Inputs) -> Priced:
        if not live or inputs.on_cpu:
            return known_price(inputs, region)
        where = region or region_of(inputs.image)
        if where is None:
            raise UserError("needs a region", where="--live", fix="Write --region, such as us-west-2.")
        return Priced(live_price(inputs.instance, where))

    return checked(sources, offline, price, count_rows=True).plan

"""Agents as rollouts: any program that speaks OpenAI's or Anthropic's API, unaware of this library.

- `AgentGateway`: a server on this machine on top of a `SamplingClient`. Needs the extra ``agents``.
- `AgentRollout`: one rollout, with an address and a key of its own; its calls become training examples.
- `AgentCall`: one recorded call. `Trajectory`: calls that continue each other, as one sequence of tokens.
- `ToolParser`: reads tool calls, as `ParsedReply`.

Example:
    ::

        async with loops.AgentGateway(sampler, force={"temperature": 1.0, "top_p": 1.0}) as gateway:
            async with gateway.rollout() as rollout:
                reward = await my_agent(rollout.base_url, rollout.api_key, task)
            datums = rollout.to_datums(advantage=reward - baseline)
"""

from ._agents.gateway import AgentGateway, AgentRollout
from ._agents.parsers import ParsedReply, ToolParser
from ._agents.records import AgentCall
from ._agents.trajectories import Trajectory

__all__: list[str] = ["AgentCall", "AgentGateway", "AgentRollout", "ParsedReply", "ToolParser", "Trajectory"]

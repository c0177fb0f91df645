"""Every name that is written, in one place: those for generative AI are still under development.

Sources: the semantic conventions of OpenTelemetry for generative AI (spans and metrics of clients), HTTP and errors.
"""

from __future__ import annotations

from typing import Final

TEXT_COMPLETION: Final = "text_completion"
PROVIDER: Final = "baseten"

GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_MODEL: Final = "gen_ai.request.model"
GEN_AI_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_TOP_K: Final = "gen_ai.request.top_k"
GEN_AI_SEED: Final = "gen_ai.request.seed"
GEN_AI_CHOICES: Final = "gen_ai.request.choice.count"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - no secret
GEN_AI_DURATION: Final = "gen_ai.client.operation.duration"
GEN_AI_TOKENS: Final = "gen_ai.client.token.usage"

GEN_AI_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
GEN_AI_TOKEN_COUNTS: Final = tuple(float(4**power) for power in range(14))
"""The boundaries of histograms that the conventions recommend."""

ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

HTTP_METHOD: Final = "http.request.method"
HTTP_URL: Final = "url.full"
HTTP_STATUS: Final = "http.response.status_code"
HTTP_RESENDS: Final = "http.request.resend_count"

REQUEST_ID: Final = "loops.request_id"
RUN_ID: Final = "loops.run_id"
SAMPLER_ID: Final = "loops.sampler_id"
CHECKPOINT_ID: Final = "loops.checkpoint_id"
POLICY_VERSION: Final = "loops.policy_version"
OPERATION: Final = "loops.operation.name"
OPERATION_ID: Final = "loops.operation.id"
DATUMS: Final = "loops.datums"
TOKENS: Final = "loops.tokens"
LOSS: Final = "loops.loss_fn"
KIND: Final = "loops.kind"
"""As `InFlight.kind`."""

DURATION: Final = "loops.client.operation.duration"
RETRIES: Final = "loops.client.retries"
IN_FLIGHT: Final = "loops.client.in_flight"

SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)

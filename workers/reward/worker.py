"""The reward role: text of the responses, then the reward function's numbers. Becomes a Ray actor by `ray.remote`.

It decodes once per block and leaves the reward function to a pool of processes, so the actor itself never runs user
code and always answers.
"""

from __future__ import annotations

from workers.protocol import RolloutBlock, ScoreRequest, Scores
from workers.reward.child import Sample
from workers.reward.decoding import load_decoder
from workers.reward.function import RewardSpec
from workers.reward.pool import RewardPool


class RewardWorker:
    """Scores rollout blocks.

    tokenizer_path: directory or hub name of the tokenizer that made the token ids.
    num_workers, timeout_s: processes that run the reward function, and seconds one call may take.
    tokenizer_json: from `decoder_json`, if the caller has the tokenizer at hand: saves importing transformers here.

    Raises ValueError if the reward function cannot be loaded.
    """

    def __init__(
        self,
        spec: RewardSpec,
        tokenizer_path: str,
        num_workers: int,
        timeout_s: float,
        trust_remote_code: bool = False,
        tokenizer_json: str | None = None,
    ) -> None:
        self._pool = RewardPool(spec, num_workers, timeout_s)
        self._decode = load_decoder(tokenizer_path, trust_remote_code=trust_remote_code, tokenizer_json=tokenizer_json)

    def ping(self) -> bool:
        """True: the actor has started and its reward processes have loaded the function."""
        return True

    def score(self, block: RolloutBlock, request: ScoreRequest) -> Scores:
        """Rewards of the block's sequences, in its order. A failed sample is an entry of `Scores.errors`."""
        responses = [tokens.tolist() for tokens in block.responses()]
        texts = self._decode(responses) if responses else []
        samples: list[Sample] = [
            (request.data_source[row], text, request.ground_truth[row], request.extra_info[row])
            for row, text in zip(block.prompt_of.tolist(), texts, strict=True)
        ]
        return self._pool.score(samples)

    def close(self) -> None:
        """End the reward processes."""
        self._pool.close()

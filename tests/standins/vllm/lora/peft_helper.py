class PEFTHelper:
    def get_rank_and_scaling(self, module_name: str) -> tuple[int, float]:
        raise NotImplementedError

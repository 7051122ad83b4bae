# SPDX-License-Identifier: Apache-2.0
llm_system_prompt = """Describe the "picture".
Prompt:\n"""

"""Every word of the page, in English and Chinese."""

from __future__ import annotations

WORDS: dict[str, tuple[str, str]] = {  # name: English, Chinese
    "new_chat": ("New chat", "新对话"),
    "conversations": ("Conversations", "对话记录"),
    "title": ("Title", "标题"),
    "rename": ("Rename", "重命名"),
    "delete": ("Delete", "删除"),
    "really_delete": ("Yes, delete", "确认删除"),
    "keep": ("Keep it", "保留"),
    "language": ("Language", "语言"),
    "message": ("Message", "消息"),
    "ask": ("Ask something. Enter sends, Shift+Enter begins a new line.", "请输入问题，回车发送，Shift+回车换行。"),
    "tool_result": (
        "Result of {name}, call {number} of {count}",
        "请输入 {name} 的返回结果（第 {number} 个，共 {count} 个）",
    ),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "settings": ("Settings", "设置"),
    "model": ("Model", "模型"),
    "api_key": ("API key", "API 密钥"),
    "api_key_info": ("For this page only; it is not stored.", "仅用于当前页面，不会保存。"),
    "system": ("System prompt", "系统提示词"),
    "sampling": ("Sampling", "采样参数"),
    "sampling_info": ("An empty field leaves the choice to the server.", "留空则使用服务器的默认值。"),
    "server_default": ("server's default", "服务器默认"),
    "temperature": ("Temperature", "温度 temperature"),
    "top_p": ("Top p", "核采样 top_p"),
    "top_k": ("Top k", "top_k"),
    "min_p": ("Min p", "min_p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "presence_penalty": ("Presence penalty", "存在惩罚"),
    "frequency_penalty": ("Frequency penalty", "频率惩罚"),
    "max_tokens": ("Max tokens", "最大输出 token 数"),
    "seed": ("Seed", "随机种子"),
    "stop_strings": ("Stop strings, one a line", "停止字符串（每行一个）"),
    "form": ("Structured output and tools", "结构化输出与工具"),
    "schema": ("JSON schema of the answer", "回答的 JSON Schema"),
    "tools": ("Tools, a JSON list", "工具（JSON 列表）"),
    "tool_choice": ("Tool choice: auto, none, required, or a name", "工具选择：auto、none、required 或函数名"),
    "extra": ("Other fields of the request, a JSON object", "其他请求字段（JSON 对象）"),
    "empty_title": ("What can I do for you?", "有什么可以帮您？"),
    "empty_text": (
        "Conversations are kept on the server for this browser alone.",
        "对话保存在服务器上，仅此浏览器可见。",
    ),
    "untitled": ("New chat", "新对话"),
    "tool_call": ("Tool call: {name}", "工具调用：{name}"),
    "tool_answer": ("Result of {name}", "{name} 的返回结果"),
    "stopped": ("stopped", "已停止"),
    "length": ("ended at the token limit", "达到 token 上限"),
    "failed": ("ended by an error", "因错误中断"),
    # the panel
    "speed": ("Tokens/s", "速度 token/秒"),
    "first_token": ("First token", "首 token 用时"),
    "tokens_in": ("Tokens in", "输入 token"),
    "tokens_out": ("Tokens out", "输出 token"),
    "kv_use": ("KV cache in use", "KV 缓存占用"),
    "memory": ("Memory", "内存"),
    "requests": ("Running, waiting", "运行中，等待中"),
    "energy": ("Energy", "能耗"),
    "moved": ("Memory traffic, counted", "内存读写量（计算值）"),
    "cost": ("Cost", "费用"),
    "not_measured": ("not measured", "未测量"),
    "none_yet": ("–", "–"),
    "seconds": ("s", "秒"),
    # what can go wrong
    "no_cookie": (
        "This browser sends no cookie, and the page keeps conversations apart by one. Allow cookies and reload.",
        "浏览器未发送 Cookie，页面依靠它区分用户。请允许 Cookie 后刷新。",
    ),
    "empty_message": ("The message is empty.", "消息为空。"),
    "busy": ("An answer is being written; stop it first.", "正在生成回答，请先停止。"),
    "too_many_streams": (
        "{limit} answers are being written, which is the limit. Try again shortly.",
        "同时生成的回答已达上限 {limit}，请稍后再试。",
    ),
    "too_many_conversations": (
        "This browser has {limit} conversations, which is the limit. Delete one first.",
        "此浏览器的对话已达上限 {limit} 个，请先删除一些。",
    ),
    "too_many_messages": (
        "This conversation would have {count} messages; the limit is {limit}. Begin a new one.",
        "该对话将有 {count} 条消息，上限为 {limit}，请新建对话。",
    ),
    "message_too_long": (
        "The message has {size} bytes; the limit is {limit}.",
        "消息有 {size} 字节，上限为 {limit}。",
    ),
    "conversation_too_long": (
        "This conversation would have {size} bytes; the limit is {limit}. Begin a new one.",
        "该对话将有 {size} 字节，上限为 {limit}，请新建对话。",
    ),
    "changed_elsewhere": (
        "This conversation was changed in another window. Reload the page.",
        "该对话已在其他窗口中被修改，请刷新页面。",
    ),
    "conversation_gone": ("This conversation is not there any more.", "该对话已不存在。"),
    "empty_new_title": ("The title is empty.", "标题为空。"),
    "history_failed": ("The history cannot be read or written: {reason}", "无法读写历史记录：{reason}"),
    "server_unreachable": ("The server does not answer: {reason}", "服务器没有响应：{reason}"),
    "server_refused": (
        "The server refused: {message} (status {status})",
        "服务器拒绝了请求：{message}（状态码 {status}）",
    ),
    "server_broke_off": ("The server broke the answer off: {reason}", "服务器中断了回答：{reason}"),
    "answer_too_long": (
        "The answer reached {limit} bytes, the limit of a message.",
        "回答已达单条消息上限 {limit} 字节。",
    ),
    "not_a_number": ("{name} must be a number, got {value}.", "{name} 必须是数字，当前为 {value}。"),
    "not_whole": ("{name} must be a whole number, got {value}.", "{name} 必须是整数，当前为 {value}。"),
    "out_of_range": (
        "{name} must be from {low} to {high}, got {value}.",
        "{name} 必须在 {low} 到 {high} 之间，当前为 {value}。",
    ),
    "too_long": ("{name} has {size} bytes; the limit is {limit}.", "{name} 有 {size} 字节，上限为 {limit}。"),
    "too_many_stops": ("{count} stop strings; the limit is {limit}.", "停止字符串有 {count} 个，上限为 {limit}。"),
    "bad_json": (
        "{name} is not JSON: {reason}, line {line}, column {column}.",
        "{name} 不是合法的 JSON：{reason}，第 {line} 行第 {column} 列。",
    ),
    "too_deep": ("{name} is nested deeper than {limit} levels.", "{name} 的嵌套超过 {limit} 层。"),
    "schema_not_object": ("The JSON schema must be an object, got {kind}.", "JSON Schema 必须是对象，当前为 {kind}。"),
    "tools_not_list": (
        "Tools must be a list of 1 to {limit} objects, got {kind}.",
        "工具必须是含 1 到 {limit} 个对象的列表，当前为 {kind}。",
    ),
    "bad_tool": ("Tool {number}: {reason}.", "第 {number} 个工具有误：{reason}。"),
    "choice_without_tools": ("Tool choice is {value}, and there are no tools.", "工具选择为 {value}，但没有提供工具。"),
    "unknown_choice": (
        "Tool choice must be auto, none, required or one of {names}, got {value}.",
        "工具选择必须是 auto、none、required 或 {names} 之一，当前为 {value}。",
    ),
    "extra_not_object": (
        "Other fields must be a JSON object, got {kind}.",
        "其他字段必须是 JSON 对象，当前为 {kind}。",
    ),
    "extra_taken": ("Other fields cannot set {name}: the page sets it.", "其他字段不能设置 {name}：页面已设置该字段。"),
    "bad_api_key": ("The API key holds characters that no header can carry.", "API 密钥含有无法发送的字符。"),
}


def text(name: str, lang: str, /, **values: object) -> str:
    """The words of that name; lang: "zh", or anything for English."""
    words = WORDS[name][1 if lang == "zh" else 0]
    return words.format(**values) if values else words


class Refusal(Exception):
    """Something that the user is told in their language: a name of WORDS and its values. str() is the English."""

    def __init__(self, name: str, /, **values: object) -> None:
        super().__init__(text(name, "en", **values))
        self.name = name
        self.values = values

    def said(self, lang: str) -> str:
        return text(self.name, lang, **self.values)


def language(choice: str, accept_language: str) -> str:
    """ "en" or "zh": the choice, or for "auto" what an Accept-Language header prefers; English where it is neither."""
    if choice in ("en", "zh"):
        return choice
    best, best_weight = "en", 0.0
    for part in accept_language[:1000].split(","):
        tag, *parameters = part.strip().lower().split(";")
        weight = 1.0
        for parameter in parameters:
            if parameter.strip().startswith("q="):
                try:
                    weight = float(parameter.strip()[2:])
                except ValueError:
                    weight = 0.0
        primary = tag.partition("-")[0]
        if primary in ("en", "zh") and weight > best_weight:
            best, best_weight = primary, weight
    return best

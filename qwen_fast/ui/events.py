"""What the components of the page do: each event calls Chats, and shows what comes back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import gradio as gr

from .chats import Chats, View, Visitor
from .config import UiConfig
from .guard import COOKIE
from .history import Conversation, owner_of
from .messages import for_page, pending_call
from .panel import greeting, notice, panel
from .settings import FIELDS
from .texts import Refusal, language, text

if TYPE_CHECKING:
    from .page import Page

Updates = dict[Any, Any]


def visitor_of(request: gr.Request, api_key: str | None) -> Visitor:
    """Who asks, by the cookie. Refusal where there is none."""
    return Visitor(owner_of(request.cookies.get(COOKIE)), str(request.session_hash), api_key or "")


class Events:
    def __init__(self, page: Page, chats: Chats, config: UiConfig) -> None:
        self.page, self.chats, self.config = page, chats, config

    def connect(self) -> None:
        """For inside the Blocks."""
        page = self.page
        form = [page.fields[name] for name in FIELDS]
        who = [page.lang, page.api_key]
        asked = [page.current, *who, *form]
        view = [page.chat, page.box, page.listed, page.title, page.panel, page.notice, page.current, page.sure]
        whole = [*view, *form]
        words = list(page.worded("en"))
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        streams = {**quick, "concurrency_limit": None}  # Chats counts them itself
        page.box.submit(self.send, [page.box, *asked], view, **streams)
        page.chat.edit(self.edit, asked, view, **streams)
        page.chat.retry(self.retry, asked, view, **streams)
        page.chat.undo(self.undo, asked, view, **quick)
        page.box.stop(self.stop, None, None, **quick)
        page.new.click(self.open_new, who, whole, **quick)
        page.listed.input(self.open, [page.listed, *who], whole, **quick)
        for renaming in (page.rename.click, page.title.submit):
            renaming(self.rename, [page.title, page.current, *who], [page.listed, page.title, page.notice], **quick)
        page.delete.click(lambda id: gr.update(visible=id is not None), page.current, page.sure, **quick)
        page.keep.click(lambda: gr.update(visible=False), None, page.sure, **quick)
        page.really.click(self.delete, [page.current, *who], whole, **quick)
        page.api_key.submit(self.list_models, who, [page.fields["model"], page.notice], **quick)
        page.language.input(self.choose_language, [page.language, page.current], [page.lang, *words, *view], **quick)
        page.blocks.load(self.load, page.api_key, list(dict.fromkeys([page.lang, *words, *whole])), **quick)
        page.blocks.unload(self.gone)

    # -- answers

    async def send(
        self, request: gr.Request, content: str, id: str | None, lang: str, api_key: str, *form: Any
    ) -> AsyncGenerator[Updates, None]:
        values = dict(zip(FIELDS, form))

        def views(visitor: Visitor) -> AsyncGenerator[View, None]:
            return self.chats.send(visitor, id, content or "", values)

        async with contextlib.aclosing(self._shown(views, lang, api_key, request, sent=True)) as updates:
            async for update in updates:
                yield update

    async def edit(
        self, request: gr.Request, data: gr.EditData, id: str | None, lang: str, api_key: str, *form: Any
    ) -> AsyncGenerator[Updates, None]:
        values = dict(zip(FIELDS, form))

        async def views(visitor: Visitor) -> AsyncGenerator[View, None]:
            index = await self._origin(visitor, id, data.index, lang)
            async with contextlib.aclosing(self.chats.edit(visitor, id, index, _plain(data.value), values)) as found:
                async for view in found:
                    yield view

        async with contextlib.aclosing(self._shown(views, lang, api_key, request, again=id)) as updates:
            async for update in updates:
                yield update

    async def retry(
        self, request: gr.Request, data: gr.RetryData, id: str | None, lang: str, api_key: str, *form: Any
    ) -> AsyncGenerator[Updates, None]:
        values = dict(zip(FIELDS, form))

        async def views(visitor: Visitor) -> AsyncGenerator[View, None]:
            index = await self._origin(visitor, id, data.index, lang)
            async with contextlib.aclosing(self.chats.retry(visitor, id, index, values)) as found:
                async for view in found:
                    yield view

        async with contextlib.aclosing(self._shown(views, lang, api_key, request, again=id)) as updates:
            async for update in updates:
                yield update

    async def undo(
        self, request: gr.Request, data: gr.UndoData, id: str | None, lang: str, api_key: str, *form: Any
    ) -> Updates:
        page = self.page
        try:
            visitor = visitor_of(request, api_key)
            index = await self._origin(visitor, id, data.index, lang)
            conversation, typed = await self.chats.undo(visitor, id, index)
            shown = self._conversation(conversation, lang)
            return {**shown, page.box: self._box(conversation, lang, value=typed), page.notice: notice("")}
        except Refusal as refusal:
            return {page.notice: notice(refusal.said(lang))}

    def stop(self, request: gr.Request) -> None:
        self.chats.stop(str(request.session_hash))

    def gone(self, request: gr.Request) -> None:
        """The page was closed."""
        self.chats.stop(str(request.session_hash))

    async def _origin(self, visitor: Visitor, id: str | None, shown: Any, lang: str) -> int:
        """The message that a bubble was made of."""
        conversation = await self.chats.open(visitor, id)
        origin = for_page(conversation.messages, lang)[1]
        place = shown[0] if isinstance(shown, (list, tuple)) else shown
        if not isinstance(place, int) or not 0 <= place < len(origin):
            raise Refusal("changed_elsewhere")
        return origin[place]

    async def _shown(
        self, views: Any, lang: str, api_key: str, request: gr.Request, sent: bool = False, again: str | None = None
    ) -> AsyncGenerator[Updates, None]:
        """views: takes the visitor, gives Views. sent: what was typed leaves the box when it is on its way. again: the
        conversation to show as it is where nothing comes of it."""
        page = self.page
        first = True
        try:
            visitor = visitor_of(request, api_key)
            async with contextlib.aclosing(views(visitor)) as found:
                async for view in found:
                    if view.error is not None and view.error.name == "conversation_gone":
                        raise view.error  # it was deleted while it was being answered
                    shown = self._view(view, lang)
                    box = {"value": ""} if first and sent else {}
                    if first or not view.running:
                        shown[page.box] = self._box(view.conversation, lang, running=view.running, **box)
                        shown.update(await self._list(visitor, view.conversation))
                    first = False
                    yield shown
        except Refusal as refusal:
            last: Updates = {page.notice: notice(refusal.said(lang))}
            if not first:
                last[page.box] = gr.update(submit_btn=True, stop_btn=False)
            elif again is not None:
                with contextlib.suppress(Refusal):  # a bubble that was edited gets its text back
                    last[page.chat] = for_page((await self.chats.open(visitor, again)).messages, lang)[0]
            yield last

    # -- conversations

    async def load(self, request: gr.Request, api_key: str) -> Updates:
        """The page as it begins: language, the conversation that was changed last, models, numbers."""
        page = self.page
        lang = language(self.config.lang, request.headers.get("accept-language", ""))
        try:
            visitor = visitor_of(request, api_key)
            lang = language((await self.chats.preferences(visitor)).get("lang", "auto"), lang)
            entries = await self.chats.entries(visitor)
            conversation = await self.chats.open(visitor, entries[0].id if entries else None)
            listed = await self._list(visitor, conversation)
        except Refusal as refusal:
            return {**self._worded(lang), page.notice: notice(refusal.said(lang))}
        found = self._worded(lang)
        opened = {
            **self._conversation(conversation, lang),
            **self._form(conversation, lang),
            **listed,
            page.box: self._box(conversation, lang),
            page.panel: panel({**await self.chats.numbers(visitor), **_last_stats(conversation)}, lang),
        }
        models = await self._models(visitor, lang)
        for component, update in {**opened, **models}.items():
            both = isinstance(found.get(component), dict) and isinstance(update, dict)
            found[component] = {**found[component], **update} if both else update
        return found

    async def open(self, request: gr.Request, id: str | None, lang: str, api_key: str) -> Updates:
        try:
            visitor = visitor_of(request, api_key)
            conversation = await self.chats.open(visitor, id)
            listed = await self._list(visitor, conversation)
        except Refusal as refusal:
            return {self.page.notice: notice(refusal.said(lang))}
        return {
            **self._conversation(conversation, lang),
            **(self._form(conversation, lang) if id is not None else {}),
            **listed,
            self.page.box: self._box(conversation, lang, value=""),
            self.page.panel: panel({**await self.chats.numbers(visitor), **_last_stats(conversation)}, lang),
            self.page.notice: notice(""),
        }

    async def open_new(self, request: gr.Request, lang: str, api_key: str) -> Updates:
        return await self.open(request, None, lang, api_key)

    async def rename(self, request: gr.Request, title: str, id: str | None, lang: str, api_key: str) -> Updates:
        page = self.page
        try:
            visitor = visitor_of(request, api_key)
            await self.chats.rename(visitor, id, title or "")
            return {**await self._list(visitor, await self.chats.open(visitor, id)), page.notice: notice("")}
        except Refusal as refusal:
            return {page.notice: notice(refusal.said(lang))}

    async def delete(self, request: gr.Request, id: str | None, lang: str, api_key: str) -> Updates:
        try:
            await self.chats.delete(visitor_of(request, api_key), id)
        except Refusal as refusal:
            return {self.page.notice: notice(refusal.said(lang))}
        return await self.open_new(request, lang, api_key)

    async def list_models(self, request: gr.Request, lang: str, api_key: str) -> Updates:
        try:
            return {self.page.notice: notice(""), **await self._models(visitor_of(request, api_key), lang)}
        except Refusal as refusal:
            return {self.page.notice: notice(refusal.said(lang))}

    async def choose_language(self, request: gr.Request, choice: str, id: str | None) -> Updates:
        lang = language(choice, "")
        found = self._worded(lang)
        try:
            visitor = visitor_of(request, "")
            await self.chats.set_preferences(visitor, {"lang": lang})
            conversation = await self.chats.open(visitor, id)
        except Refusal as refusal:
            return {**found, self.page.notice: notice(refusal.said(lang))}
        placed = for_page(conversation.messages, lang)[0]
        found[self.page.chat] = gr.update(value=placed, placeholder=greeting(lang))
        found[self.page.box] = gr.update(placeholder=_asking(conversation, lang))
        found[self.page.panel] = panel({**await self.chats.numbers(visitor), **_last_stats(conversation)}, lang)
        found[self.page.notice] = notice("")
        return found

    # -- updates

    def _worded(self, lang: str) -> Updates:
        page = self.page
        found = {page.lang: lang, **page.worded(lang)}
        found[page.language] = {**found[page.language], "value": lang}
        found[page.chat] = gr.update(placeholder=greeting(lang))
        return found

    def _view(self, view: View, lang: str) -> Updates:
        page = self.page
        return {
            page.chat: for_page(view.conversation.messages, lang)[0],
            page.panel: panel(view.numbers, lang),
            page.notice: notice(view.error.said(lang) if view.error else ""),
            page.current: view.conversation.id,
        }

    def _conversation(self, conversation: Conversation, lang: str) -> Updates:
        page = self.page
        shown = for_page(conversation.messages, lang)[0]
        return {
            page.chat: gr.update(value=shown),
            page.current: conversation.id if conversation.revision else None,
            page.sure: gr.update(visible=False),
        }

    def _form(self, conversation: Conversation, lang: str) -> Updates:
        """The fields as they were when the conversation was last saved. The model stays as it is where none is named."""
        kept = conversation.settings
        found = {self.page.fields[name]: gr.update(value=kept.get(name)) for name in FIELDS if name != "model"}
        if kept.get("model"):
            found[self.page.fields["model"]] = gr.update(value=kept["model"])
        return found

    async def _list(self, visitor: Visitor, conversation: Conversation) -> Updates:
        entries = await self.chats.entries(visitor)
        choices = [(entry.title or "?", entry.id) for entry in entries]
        current = conversation.id if conversation.revision else None
        title = next((entry.title for entry in entries if entry.id == current), "")
        return {self.page.listed: gr.update(choices=choices, value=current), self.page.title: title}

    async def _models(self, visitor: Visitor, lang: str) -> Updates:
        page = self.page
        try:
            models = await self.chats.models(visitor)
        except Refusal as refusal:
            return {page.notice: notice(refusal.said(lang))}
        names = [model.id for model in models]
        return {page.fields["model"]: gr.update(choices=names, value=self.config.model or next(iter(names), None))}

    def _box(self, conversation: Conversation, lang: str, running: bool = False, **more: Any) -> Any:
        asking = _asking(conversation, lang)
        return gr.update(submit_btn=not running, stop_btn=running, placeholder=asking, **more)


def _asking(conversation: Conversation, lang: str) -> str:
    call = pending_call(conversation.messages)
    if call is None:
        return text("ask", lang)
    return text("tool_result", lang, number=call[0], count=call[1], name=call[2]["function"]["name"])


def _last_stats(conversation: Conversation) -> dict[str, Any]:
    """The numbers of the last answer."""
    last = conversation.messages[-1] if conversation.messages else {}
    return dict((last.get("meta") or {}).get("stats") or {})


def _plain(value: Any) -> str:
    """The text of an edited bubble."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return str(value.get("text") or value.get("content") or "")
    return "".join(_plain(part) for part in value) if isinstance(value, list) else ""

"use strict";
// One tab stop for many items (WAI-ARIA tree and treegrid): arrows move, left and right fold.

// items   selector of the items inside root
// unfold  (item) => void, fold (item) => void; called where aria-expanded says that there is something to do
// open    (item, event) => void for Enter; touch (item) => void when an item gets the focus
function rove(root, items, { unfold, fold, open, touch }) {
  const all = () => [...root.querySelectorAll(items)].filter((item) => !item.closest("[hidden]"));
  const level = (item) => Number(item.getAttribute("aria-level") ?? 1);

  function makeCurrent(item) {
    root.querySelectorAll('[tabindex="0"]').forEach((other) => other.setAttribute("tabindex", "-1"));
    item.setAttribute("tabindex", "0");
  }
  function focus(item) {
    if (!item) return;
    makeCurrent(item);
    item.focus();
    item.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  root.addEventListener("focusin", (event) => {
    const item = event.target.closest(items);
    if (!item || item !== event.target) return;
    makeCurrent(item);
    touch?.(item);
  });
  root.addEventListener("keydown", (event) => {
    const item = event.target.closest(items);
    if (!item || item !== event.target || event.altKey || event.ctrlKey || event.metaKey) return;
    const list = all();
    const at = list.indexOf(item);
    const expanded = item.getAttribute("aria-expanded");
    const actions = {
      ArrowDown: () => focus(list[at + 1]),
      ArrowUp: () => focus(list[at - 1]),
      Home: () => focus(list[0]),
      End: () => focus(list.at(-1)),
      ArrowRight: () => (expanded === "false" ? unfold(item) : focus(list[at + 1])),
      ArrowLeft: () =>
        expanded === "true"
          ? fold(item)
          : focus(list.slice(0, at).findLast((other) => level(other) < level(item)) ?? list[at - 1]),
      Enter: () => open(item, event),
      " ": () => (expanded === "true" ? fold(item) : expanded === "false" ? unfold(item) : open(item, event)),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  });
  return { focus, makeCurrent };
}

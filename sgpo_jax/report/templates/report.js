"use strict";
// Buttons above each set of generations show the problems with one tag, or all of them.
for (const section of document.querySelectorAll("[data-samples]")) {
  const buttons = [...section.querySelectorAll("button[data-tag]")];
  const problems = [...section.querySelectorAll("[data-tags]")];
  const choose = (tag) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.tag === tag));
    for (const problem of problems) problem.hidden = tag !== "" && !problem.dataset.tags.split("|").includes(tag);
  };
  for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.tag));
}

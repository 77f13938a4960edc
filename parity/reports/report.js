"use strict";
// Finds prompts. Without this script the page shows all of them.
const controls = document.getElementById("find");
if (controls) {
  const words = document.getElementById("find-words");
  const differing = document.getElementById("find-differing");
  const shown = document.getElementById("find-shown");
  const prompts = Array.from(document.querySelectorAll("#prompts > .prompt"));
  let texts = null;
  const show = () => {
    const wanted = words.value.toLowerCase();
    texts ??= prompts.map((prompt) =>
      Array.from(prompt.querySelectorAll(".id, .text"), (part) => part.textContent).join("\n").toLowerCase()
    );
    let count = 0;
    prompts.forEach((prompt, number) => {
      const fits = texts[number].includes(wanted) && (!differing.checked || prompt.classList.contains("differs"));
      prompt.hidden = !fits;
      count += fits;
    });
    shown.textContent = `${count} of ${prompts.length} shown`;
  };
  controls.hidden = false;
  words.addEventListener("input", show);
  differing.addEventListener("change", show);
  show();
}

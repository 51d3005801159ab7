// Questions to this server: JSON in, JSON or lines of JSON out. An error is thrown with the server's sentence.

async function post(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: was it ended?");
  }
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

export async function ask(path, body, signal) {
  return (await post(path, body, signal)).json();
}

export async function* stream(path, body, signal) {
  const reader = (await post(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      yield event;
    }
  }
}

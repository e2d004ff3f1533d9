// Vercel's AI SDK with its default provider, which speaks the Responses API, and the time of day in its instructions.

import { createInterface } from "node:readline";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText } from "ai";

const openai = createOpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY });
const messages = [];

for await (const question of createInterface({ input: process.stdin })) {
  messages.push({ role: "user", content: question });
  const result = await generateText({
    model: openai("soma"),
    system: `You are terse. It is ${new Date().toISOString()}.`,
    messages,
    maxOutputTokens: 16,
    maxRetries: 0,
  });
  messages.push(...result.response.messages);
  const { "x-soma-session": session, "x-soma-engine": engine } = result.response.headers;
  console.log(JSON.stringify({ text: result.text, session, engine }));
}

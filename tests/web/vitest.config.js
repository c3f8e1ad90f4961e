import { defineConfig } from 'vitest/config'

export default defineConfig({
  server: { fs: { strict: false } },
  test: { environment: 'jsdom', include: ['*.test.js'], setupFiles: ['./setup.js'] },
})

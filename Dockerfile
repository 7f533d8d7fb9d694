FROM python:3.11-slim
RUN useradd --system botserver && install -d -o botserver -m 700 /data
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
USER botserver
ENV PORT=8000 DATABASE_URL=sqlite:////data/botserver.db
CMD ["gunicorn", "botserver:create_app()"]
